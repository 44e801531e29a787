"""The main job, live: a training is killed twice and ends where an uninterrupted one ends."""
