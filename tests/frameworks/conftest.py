"""What runs in other processes, some of it for libraries that are not installed here, is no test."""

collect_ignore = ["drive.py", "judge.py", "misuse.py"]
