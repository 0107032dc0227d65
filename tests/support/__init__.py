"""What tests share: models in small, as their producers write them."""
