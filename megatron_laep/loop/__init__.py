"""One run, from its arguments to the next pruning: the hooks in Megatron's loop and what they drive."""
