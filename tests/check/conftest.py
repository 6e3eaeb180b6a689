"""The loops are scripts to be run, not modules with tests."""

collect_ignore_glob = ["loops/*"]
