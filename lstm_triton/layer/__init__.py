"""One layer in all its directions: the operators, what they compute, and what stands in where no kernel runs."""
