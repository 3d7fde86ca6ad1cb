# seconds: 8
timeout 8 ./v4
