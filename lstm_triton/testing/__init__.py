"""Programs of one launch interleaved in Triton's interpreter, by any schedule."""
