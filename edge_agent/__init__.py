"""Acts on a device: trains on local data, serves the model, reports what is true there."""
