"""Training: data sets, objectives, and a trainer that resumes bit for bit."""
