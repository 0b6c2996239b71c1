# SPDX-License-Identifier: MIT OR Apache-2.0
# make                    builds command line, daemon and hook, manual pages, completion
# make install            installs them, and the kernel module's source for DKMS
# make uninstall          removes what that installed, but for the configuration
#
# After an install, as root: systemd-sysusers; dkms install kvm-ept-sample/0.1.0;
# systemctl daemon-reload; systemctl enable --now ept-virt; systemctl reload libvirtd (or
# virtqemud). Before an uninstall: systemctl disable --now ept-virt;
# dkms remove kvm-ept-sample/0.1.0 --all.
#
# Packages install with DESTDIR. Debian's are made by `cargo xtask deb`, or by
# dpkg-buildpackage; rpm/ept-virt.spec makes those of other distributions.

CARGO ?= cargo
CARGO_TARGET_DIR ?= target
# "lab" builds in a quarter of the time, without link-time optimisation.
PROFILE ?= release

PREFIX ?= /usr
SYSCONFDIR ?= /etc
bindir = $(PREFIX)/bin
datadir = $(PREFIX)/share
mandir = $(datadir)/man
unitdir = $(PREFIX)/lib/systemd/system
sysusersdir = $(PREFIX)/lib/sysusers.d
bashdir = $(datadir)/bash-completion/completions
fishdir = $(datadir)/fish/vendor_completions.d
zshdir ?= $(datadir)/zsh/site-functions
# Where DKMS looks, whatever the prefix.
dkmsdir = /usr/src/kvm-ept-sample-$(module-version)
hook = $(SYSCONFDIR)/libvirt/hooks/qemu.d/ept-virt
config = $(SYSCONFDIR)/ept-virt/ept-virt.toml

# The group that may ask the daemon: those who look after guests without being root.
GROUP ?= ept-virt

module-version = $(shell sed -n 's/^PACKAGE_VERSION="\(.*\)"/\1/p' kmod/dkms.conf)
built = $(CARGO_TARGET_DIR)/$(PROFILE)
pages = $(built)/man
completion = $(built)/completion
INSTALL ?= install

# cargo knows what is up to date.
all: programs generated

programs:
	$(CARGO) build --locked --profile $(PROFILE) --package ept-virt
	$(CARGO) rustc --locked --profile $(PROFILE) --package ept-virt-hook --bin ept-virt-hook \
		-- -C target-feature=+crt-static

generated: programs
	rm -rf $(pages) $(completion)
	mkdir -p $(pages) $(completion)
	$(built)/ept-virt man $(pages)
	for shell in bash zsh fish; do \
		$(built)/ept-virt completion $$shell >$(completion)/$$shell || exit 1; done
# zsh runs the file itself at the first TAB; what it defines there has to be called.
	echo '[ "$$funcstack[1]" != _ept-virt ] || _clap_dynamic_completer_ept_virt "$$@"' \
		>>$(completion)/zsh

install: install-program install-dkms

install-program:
	$(INSTALL) -d $(DESTDIR)$(bindir) $(DESTDIR)$(dir $(hook))
	$(INSTALL) -m755 $(built)/ept-virt $(built)/ept-virt-hook $(DESTDIR)$(bindir)
# AppArmor lets libvirt run what is in /usr/bin, or among its hooks: a link to the former,
# which an upgrade replaces in one step, or a copy.
	$(if $(filter /usr,$(PREFIX)),ln -sf $(bindir)/ept-virt-hook,$(INSTALL) -m755 $(built)/ept-virt-hook) \
		$(DESTDIR)$(hook)
	for page in $(pages)/*.[1-9] docs/*.[2-9]; do case $$page in \
		*/kvm_ept_sample.4) ;; \
		*) $(INSTALL) -Dm644 -t $(DESTDIR)$(mandir)/man$${page##*.} $$page || exit 1 ;; esac; done
	$(INSTALL) -Dm644 cli/dist/ept-virt.service $(DESTDIR)$(unitdir)/ept-virt.service
	$(INSTALL) -Dm644 xml-schemas/placement.rng $(DESTDIR)$(datadir)/ept-virt/placement.rng
	$(INSTALL) -Dm644 $(completion)/bash $(DESTDIR)$(bashdir)/ept-virt
	$(INSTALL) -Dm644 $(completion)/fish $(DESTDIR)$(fishdir)/ept-virt.fish
	$(INSTALL) -Dm644 $(completion)/zsh $(DESTDIR)$(zshdir)/_ept-virt
	$(INSTALL) -d $(DESTDIR)$(sysusersdir) $(DESTDIR)$(dir $(config))
	echo 'g $(GROUP) -' >$(DESTDIR)$(sysusersdir)/ept-virt.conf
# The administrator's own stays.
	test -e $(DESTDIR)$(config) || \
		sed 's/^#group = .*/group = "$(GROUP)"/' cli/dist/ept-virt.toml >$(DESTDIR)$(config)

install-dkms:
	$(INSTALL) -d $(DESTDIR)$(dkmsdir)/uapi
	$(INSTALL) -m644 kmod/*.[ch] kmod/Kbuild kmod/Makefile kmod/dkms.conf $(DESTDIR)$(dkmsdir)
	$(INSTALL) -m644 kmod/uapi/*.h $(DESTDIR)$(dkmsdir)/uapi
	$(INSTALL) -Dm644 docs/kvm_ept_sample.4 $(DESTDIR)$(mandir)/man4/kvm_ept_sample.4

uninstall:
	rm -f $(DESTDIR)$(hook) $(DESTDIR)$(bindir)/ept-virt $(DESTDIR)$(bindir)/ept-virt-hook
	rm -f $(DESTDIR)$(unitdir)/ept-virt.service $(DESTDIR)$(sysusersdir)/ept-virt.conf
	rm -f $(DESTDIR)$(bashdir)/ept-virt $(DESTDIR)$(fishdir)/ept-virt.fish $(DESTDIR)$(zshdir)/_ept-virt
	rm -f $(DESTDIR)$(mandir)/man1/ept-virt.1 $(DESTDIR)$(mandir)/man1/ept-virt-*.1
	rm -f $(DESTDIR)$(mandir)/man5/ept-virt.toml.5 $(DESTDIR)$(mandir)/man7/ept-virt-placement.7
	for page in docs/*.[2-9]; do rm -f $(DESTDIR)$(mandir)/man$${page##*.}/$${page##*/}; done
	rm -rf $(DESTDIR)$(datadir)/ept-virt $(DESTDIR)$(dkmsdir)

.PHONY: all programs generated install install-program install-dkms uninstall
