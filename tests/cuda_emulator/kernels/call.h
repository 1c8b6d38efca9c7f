// What every test kernel's file needs: a C entry that Python can call, and the device primitives.
#pragma once

#include <stdio.h>

#include <exception>

#include "device.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Runs `launch` and returns its error message; empty if there is none.
template <class Launch>
const char* message_of(Launch launch) {
  static char message[1000];
  message[0] = 0;
  try {
    launch();
  } catch (const std::exception& error) {
    snprintf(message, sizeof(message), "%s", error.what());
  }
  return message;
}
