"""Starting a training run on one machine or many."""
