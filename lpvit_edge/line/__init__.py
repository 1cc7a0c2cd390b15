"""Behind the camera: from frames to verdicts, recorded and delivered, watched and restarted."""
