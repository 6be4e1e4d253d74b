"""Shapes of cells: who holds which point. One kind a file: h3, boxes, polygons."""
