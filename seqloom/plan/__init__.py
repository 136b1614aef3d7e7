"""From a graph and a machine to a plan: which strategy every operator takes, where parameters live, what is recomputed."""
