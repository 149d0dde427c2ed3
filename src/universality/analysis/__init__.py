"""What kind of features are shared: how much context they need, what predicts them, what they mean."""
