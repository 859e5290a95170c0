"""The thin trainer: configuration, the stages of Algorithm 1, run folders, resume, report."""
