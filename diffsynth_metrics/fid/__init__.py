"""What FID is made of: image sources, named preprocessings, statistics, distances."""
