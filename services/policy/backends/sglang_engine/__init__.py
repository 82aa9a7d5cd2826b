"""What the sglang backend is made of: requests, servers, the pool of them, weights as folders, launched processes."""
