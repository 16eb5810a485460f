"""What tests share; README.md says what each file gives."""
