"""Models as users hold them: checkpoints on disk, read and written."""
