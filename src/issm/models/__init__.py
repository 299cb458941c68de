"""What the model is: parameters, transitions, draws. No inference."""
