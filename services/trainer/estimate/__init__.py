"""What training a model takes, estimated without loading it: memory per GPU (`memory`), tokens, FLOPs and time
(`work`), from the shape of the model (`shapes`). Pure functions, without torch."""
