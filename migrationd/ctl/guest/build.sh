#!/bin/sh
# Assemble the boot guests: x86.bin and aarch64.bin beside this script, or into DIR.
# Usage: build.sh [DIR]      needs GNU binutils (for aarch64: binutils-aarch64-linux-gnu)
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

case $(uname -m) in x86_64) x86= ;; *) x86=x86_64-linux-gnu- ;; esac
case $(uname -m) in aarch64) arm= ;; *) arm=aarch64-linux-gnu- ;; esac

if command -v "${x86}as" >/dev/null; then
    "${x86}as" --32 -o "$work/x86.o" "$here/x86.S"
    "${x86}ld" -m elf_i386 -Ttext=0xfffffc00 -e start --oformat binary -o "$out/x86.bin" "$work/x86.o"
fi
if command -v "${arm}as" >/dev/null; then
    "${arm}as" -o "$work/aarch64.o" "$here/aarch64.S"
    "${arm}ld" -Ttext=0 -e start -o "$work/aarch64.elf" "$work/aarch64.o"
    "${arm}objcopy" -O binary -j .text "$work/aarch64.elf" "$out/aarch64.bin"
fi
