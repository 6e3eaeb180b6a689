"""The paper's pitfalls, a family a file: what was recorded of a run -> a finding, or None without evidence."""
