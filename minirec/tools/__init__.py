"""Programs around the package: the command line, the model class for lm-eval, several processes."""
