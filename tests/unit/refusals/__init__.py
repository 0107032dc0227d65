"""Every mix that is refused: tables of cases by theme, and the tests that run them."""
