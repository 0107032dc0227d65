"""What tests with the real SGLang share: its models and layers in this process, servers in another."""
