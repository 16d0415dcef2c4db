"""The gated delta rule over packed documents."""
