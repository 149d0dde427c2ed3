"""Which features and circuits do language models of different architectures share? From text to report."""
