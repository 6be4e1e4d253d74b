"""The sphere: coordinates, partitions into cells, distances. numpy, no torch."""
