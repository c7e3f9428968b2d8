"""What leaves a run for other people's machines: its card, a merged model, the hub."""
