"""What the experiments share: systems, statements, the command line, figures."""
