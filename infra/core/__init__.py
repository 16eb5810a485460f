"""What every room stands on: errors, configurations, files, git, the frame of a step."""
