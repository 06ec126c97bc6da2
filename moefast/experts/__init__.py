"""Linear experts: sufficient statistics and the solvers that live on them."""
