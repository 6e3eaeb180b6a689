"""One function a pitfall: what was recorded of a run -> a finding, or None. Without evidence there is no finding."""
