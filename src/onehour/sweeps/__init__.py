"""Many runs on one machine: what a sweep's cells are trained by."""
