"""Do the features that two models share carry what they do? Groups of SAE features are taken out of running models."""
