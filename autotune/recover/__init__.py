"""One supervised run (`run`), many (`daemon`): notice, classify, step down, resume."""
