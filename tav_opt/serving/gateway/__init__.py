"""What strangers reach: it speaks KServe v2 over gRPC and HTTP, and passes on only what the contract knows."""
