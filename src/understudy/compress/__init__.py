"""A model of your own: structured pruning and distillation of an open teacher."""
