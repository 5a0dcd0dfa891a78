"""Images from disk to the device: the list of them, their order, DALI's pipelines, the feed into Paddle."""
