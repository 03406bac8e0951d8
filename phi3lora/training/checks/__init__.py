"""What is looked at before a run: one small function a finding."""
