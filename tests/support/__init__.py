"""What several tests share: tiny models, servers, checks."""
