"""What a training run is made of besides the model: its folder, log, scores, costs, options."""
