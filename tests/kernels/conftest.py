"""Scripts are run by tests, each in a process of its own: they are not collected."""

collect_ignore = ["scripts"]
