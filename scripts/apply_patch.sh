#!/usr/bin/env bash
# Makes --laep-* flags work in the scripts of a Megatron source tree, without the launcher: applies the patch of
# patches/ that is for its version, or takes it out. patches/README.md says what it adds.
#
#     scripts/apply_patch.sh ~/Megatron-LM              # a second time does nothing
#     scripts/apply_patch.sh --reverse ~/Megatron-LM
#
# All or nothing: a tree of another version, one that lacks what megatron_laep needs
# (scripts/check_seams.py), and one whose lines around the added ones differ are refused with exit code 1
# and left as they are. Needs git, and a Python with numpy; $PYTHON names it, else it is python3.
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
    echo "apply_patch.sh: $*" >&2
    exit 1
}

reverse=""
if [ "${1:-}" = --reverse ]; then
    reverse=yes
    shift
fi
[ $# = 1 ] || fail "got $# arguments, wanted one: scripts/apply_patch.sh [--reverse] TREE"
info=$1/megatron/core/package_info.py
[ -f "$info" ] && [ -f "$1/megatron/training/arguments.py" ] ||
    fail "$1 has no megatron/core and megatron/training: name the folder of a source tree of Megatron-LM"
tree=$(cd "$1" && pwd -P)

number() {
    sed -n "s/^$1 = \([0-9]*\).*/\1/p" "$info"
}

version=$(number MAJOR).$(number MINOR).$(number PATCH)
case $version in
    # The tag core_v0.19.0 calls itself 0.19.1, of which there is no release.
    0.19.1) patch=megatron-core-0.19.0.patch ;;
    0.20.0) patch=megatron-core-main-d98e8a64ddf3.patch ;;
    *) patch=megatron-core-$version.patch ;;
esac
[ -f "$repository/patches/$patch" ] || fail "$tree is megatron-core $version, for which there is no patch:" \
    "wanted one of $(cd "$repository/patches" && echo megatron-core-*.patch); nothing was changed." \
    "'python -m megatron_laep SCRIPT' needs none"

# A tree may lack pre-training scripts, as what a wheel unpacks does.
files=(--include=megatron/training/arguments.py)
for script in pretrain_gpt.py pretrain_hybrid.py; do
    [ ! -f "$tree/$script" ] || files+=("--include=$script")
done

# Without the ceiling, git would take the paths from the top of a repository that the tree lies in, and
# skip them all without a word.
apply() {
    GIT_CEILING_DIRECTORIES=$(dirname "$tree") git -C "$tree" apply "${files[@]}" "$@" \
        "$repository/patches/$patch"
}

direction=() opposite=(--reverse) already="is patched already" done="applied to"
if [ -n "$reverse" ]; then
    direction=(--reverse) opposite=() already="is not patched" done="taken out of"
fi
if apply --check "${opposite[@]}" 2>/dev/null; then
    echo "apply_patch.sh: $tree $already ($patch): nothing was changed"
    exit 0
fi
differs=$(apply --check "${direction[@]}" 2>&1) ||
    fail "$tree differs from what $patch is for; nothing was changed:"$'\n'"$differs"
if [ -z "$reverse" ]; then
    lacks=$("${PYTHON:-python3}" "$repository/scripts/check_seams.py" "$tree" 2>&1) ||
        fail "$tree lacks what megatron_laep needs; nothing was changed:"$'\n'"$lacks"
fi
apply "${direction[@]}"
echo "apply_patch.sh: $tree: $patch $done ${files[*]#--include=}"
if [ -z "$reverse" ] && [ ${#files[@]} = 1 ]; then
    echo "apply_patch.sh: there is no pre-training script; patches/README.md has the lines for yours"
fi
