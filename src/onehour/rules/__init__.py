"""The paper, one section a file: pure functions and small modules that work alone in anyone's loop."""
