"""The run half: image -> backend -> decode -> keypoints."""
