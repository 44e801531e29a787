"""The data position: loaders and samplers that go on with the next unseen batch."""
