"""Certificates for tests: an authority, and what it signs."""

import datetime
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tidemill.core.channels import NODE_NAME
from tidemill.core.settings import NodeTlsSettings

DAY = datetime.timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Authority:
    """Writes PEM files into its folder."""

    folder: Path
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    @classmethod
    def in_folder(cls, folder: Path) -> "Authority":
        folder.mkdir()
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"authority of {folder.name}")])
        builder = _builder(name, name, key, DAY).add_extension(x509.BasicConstraints(True, None), critical=True)
        made = cls(folder, key, builder.sign(key, hashes.SHA256()))
        made.ca.write_bytes(made.certificate.public_bytes(serialization.Encoding.PEM))
        return made

    def node(self, file: str = "node", name: str = NODE_NAME, valid_for: datetime.timedelta = DAY) -> NodeTlsSettings:
        """A certificate for a name, or for an address, valid until `valid_for` from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        alternative = x509.IPAddress(ip_address(name)) if name[0].isdigit() else x509.DNSName(name)
        signed = (
            _builder(subject, self.certificate.subject, key, valid_for)
            .add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        certificate, private = self.folder / f"{file}.pem", self.folder / f"{file}-key.pem"
        certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        form, no_password = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        private.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, no_password))
        return NodeTlsSettings(certificate=certificate, key=private, ca=self.ca)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, valid_for: datetime.timedelta
) -> x509.CertificateBuilder:
    until = datetime.datetime.now(datetime.UTC) + valid_for
    return x509.CertificateBuilder(
        issuer, subject, key.public_key(), x509.random_serial_number(), until - 2 * DAY, until
    )
