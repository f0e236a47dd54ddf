"""What a training run is made of beside the model: its folder, log, scores, costs, options."""
