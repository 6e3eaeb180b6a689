"""What runs train on: the embedded digits, anyone's data sets, and the loader that feeds a process."""
