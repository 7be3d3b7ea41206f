"""Training loops to copy: a GPT, a ConvNet, a ViT, each with AdamW, Muon and Celo2; a scaling study."""
